"""Train a model, or continue a run.

    python train.py [CONFIG.yaml] [section.field=value ...] [--dry-run]
    torchrun --nproc-per-node 8 train.py configs/cifar10.yaml

`--help` lists every field of a config; nvae/commands/train.py is the command.
"""

from nvae.commands.train import main

if __name__ == "__main__":
    main()
