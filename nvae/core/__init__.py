"""What every room needs and nothing of the trade: configs, errors, files, ranks, random numbers, precision."""
