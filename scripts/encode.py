"""Latents of images as data, and back to pictures.

    python scripts/encode.py runs/celeba_64 photographs/ latents.safetensors
    python scripts/encode.py runs/celeba_64 latents.safetensors pictures/ --decode

`--help` lists every option; nvae/commands/encode.py is the command.
"""

from nvae.commands.encode import main

if __name__ == "__main__":
    main()
