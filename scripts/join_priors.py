"""Join runs that trained the priors of different levels into one run.

    python scripts/join_priors.py runs/top runs/bottom --name whole

`--help` lists every option; nvae/commands/join.py is the command.
"""

from nvae.commands.join import main

if __name__ == "__main__":
    main()
