"""Put a step-distilled network, or a LoRA, into a base model's pipeline: a folder that `synthesis.teacher` can name.

BASE is a model of the hub or a diffusers folder, of a family with betas (SDXL, Stable Diffusion, Kolors, PixArt). The folder
draws by Euler steps on trailing timesteps, in the steps given here and without guidance. Its network is rounded to --dtype.

Exit code 2: wrong input, nothing was written.
"""

from __future__ import annotations

import argparse

from raydistill.export.command_line import parser_of, report_error
from raydistill.storage.atomic import replacing
from raydistill.storage.resolve import place_argument

EXAMPLES = """examples:
  raydistill assemble stabilityai/stable-diffusion-xl-base-1.0 --steps 4 --out /shared/sdxl-lightning \\
      --network ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors
  raydistill assemble stabilityai/stable-diffusion-xl-base-1.0 --steps 8 --out /shared/sdxl-lightning-8 \\
      --lora ByteDance/SDXL-Lightning/sdxl_lightning_8step_lora.safetensors
  raydistill synthesize --config fast synthesis.teacher=/shared/sdxl-lightning
"""
DTYPES = ("float16", "bfloat16", "float32")


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, EXAMPLES)
    # fmt: off
    add = parser.add_argument
    add("base", metavar="BASE", help="the model whose VAE, text encoders and configuration are taken")
    add("--network", metavar="FILE", help="weights in place of the base's: a file, a folder, or org/name/file.safetensors")
    add("--lora", metavar="FILE", help="is merged into the network's weights")
    add("--steps", type=int, required=True, metavar="N", help="evaluations that the weights are made for, 2 to 8")
    add("--dtype", choices=DTYPES, default="float16", help="of the network (default: float16)")
    add("--out", type=place_argument, required=True, metavar="FOLDER", help="folder or URI to write; must not exist")
    # fmt: on
    arguments = parser.parse_args(argv)
    if arguments.network is None and arguments.lora is None:
        parser.error("name --network or --lora: the base alone is not step-distilled")
    return arguments


def main() -> int:
    arguments = arguments_of()
    # after the command line is known to be right: torch takes seconds
    from raydistill.export.assemble import assemble, open_base
    from raydistill.export.merge import check_target

    try:
        check_target(arguments.out)
        space = open_base(arguments.base, arguments.steps)
        with replacing(arguments.out) as folder:
            folder.mkdir(parents=True)
            told = {"network": arguments.network, "lora": arguments.lora, "dtype": arguments.dtype}
            assemble(space, folder, steps=arguments.steps, **told)
    except (ValueError, OSError) as error:
        return report_error(error)
    print(f"pipeline  {arguments.out}: {arguments.steps} steps without guidance")
    print(f"draw with it: synthesis.teacher={arguments.out}")
    return 0
