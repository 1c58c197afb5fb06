"""Evaluate a run, or a checkpoint: bounds on −log p(x), FID, a report page.

    python evaluate.py runs/cifar10 --importance-samples 1000
    python evaluate.py runs/cifar10 --fid --temperature 0.7
    python evaluate.py runs/cifar10 --report
    torchrun --nproc-per-node 8 evaluate.py runs/cifar10

`--help` lists every option; nvae/commands/evaluate.py is the command.
"""

from nvae.commands.evaluate import main

if __name__ == "__main__":
    main()
