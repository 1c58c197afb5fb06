"""Prepare a set once for fast loading, check a prepared one, or say what a set is like.

    python scripts/prepare_data.py SOURCE OUT [field=value ...] [--config CONFIG.yaml]
    python scripts/prepare_data.py OUT --verify

`--help` lists every option; nvae/commands/prepare.py is the command.
"""

from nvae.commands.prepare import main

if __name__ == "__main__":
    main()
