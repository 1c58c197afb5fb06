"""What is installed, what works and how to run each recipe on this machine.

    python scripts/doctor.py [--json report.json]

`--help` lists every option; nvae/commands/doctor.py is the command.
"""

import sys

try:
    from nvae.commands.doctor import main
except (ImportError, OSError) as error:  # a broken PyTorch fails here
    print(f"!! {type(error).__name__}: {error}", "install again: README.md, Installing by hand", sep="\n")
    sys.exit(1)

if __name__ == "__main__":
    main()
