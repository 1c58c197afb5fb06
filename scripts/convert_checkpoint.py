"""Convert a checkpoint of a published code to ours, or ours to theirs.

    python scripts/convert_checkpoint.py IN OUT [--config YAML] [--dataset NAME]

`--help` lists every option; nvae/commands/convert.py is the command.
"""

from nvae.commands.convert import main

if __name__ == "__main__":
    main()
