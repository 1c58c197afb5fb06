"""Write a model folder to give to others: weights, config, a card for people, samples.

    python scripts/export.py runs/digits shared/digits --license apache-2.0

`--help` lists every option; nvae/commands/export.py is the command.
"""

from nvae.commands.export import main

if __name__ == "__main__":
    main()
