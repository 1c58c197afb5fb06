"""Train and evaluate recipes under several seeds, and set them beside each other.

    python scripts/sweep.py ablations configs/ablations/mnist_*.yaml --seeds 3

`--help` lists every option; nvae/commands/sweep.py is the command.
"""

from nvae.commands.sweep import main

if __name__ == "__main__":
    main()
