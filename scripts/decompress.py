"""Give back the images of an archive that compress.py wrote, by the same model.

    python scripts/decompress.py runs/mnist_cpu test.nvz folder/

`--help` lists every option; nvae/commands/decompress.py is the command.
"""

from nvae.commands.decompress import main

if __name__ == "__main__":
    main()
