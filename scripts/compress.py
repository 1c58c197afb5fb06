"""Compress images without loss, by a trained model.

    python scripts/compress.py runs/mnist_cpu test test.nvz --verify

`--help` lists every option; nvae/commands/compress.py is the command.
"""

from nvae.commands.compress import main

if __name__ == "__main__":
    main()
