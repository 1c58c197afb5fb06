"""A page on this machine to play with a model.

    python scripts/explore.py runs/mnist_cpu

`--help` lists every option; nvae/commands/explore.py is the command.
"""

from nvae.commands.explore import main

if __name__ == "__main__":
    main()
