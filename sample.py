"""Sample from a run, or a checkpoint, and look into its latents.

    python sample.py runs/cifar10 --temperature 0.7
    python sample.py runs/cifar10 reconstruct --groups 1 5 10 30
    torchrun --nproc-per-node 8 sample.py runs/cifar10 --count 50000 --format npz

`--help` lists every option; nvae/commands/sample.py is the command.
"""

from nvae.commands.sample import main

if __name__ == "__main__":
    main()
