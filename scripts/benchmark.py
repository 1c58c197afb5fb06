"""How fast this code is, beside the same network computed plainly.

    python scripts/benchmark.py train --plain --precision fp32 bf16 --batch 1 4 16 64

`--help` lists every option; nvae/commands/benchmark.py is the command.
"""

from nvae.commands.benchmark import main

if __name__ == "__main__":
    main()
