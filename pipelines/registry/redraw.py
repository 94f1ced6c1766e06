"""Draw the pictures of a version with the code that travels with it: run in a process of its own, by its path.

It imports nothing of this package, and of `ddpm` only what lies in the version.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def main(code: str, folder: str, out: str, seed: int, count: int, threads: int) -> None:
    """Draw, and write the pictures.

    Args:
        code: the folder that holds the version's package `ddpm`.
        folder: the version's model.
        out: the file to write.
        seed: of the noise.
        count: pictures to draw, in one batch.
        threads: of torch.
    """
    sys.path.insert(0, code)
    import torch
    from safetensors.torch import load_file, save_file

    from ddpm.conditioning import Conditioning
    from ddpm.generate import to_uint8
    from ddpm.model import load_model

    torch.set_num_threads(threads)
    asked = load_file(Path(folder) / "probe.safetensors")
    text: dict[str, Any] = {}  # the code of an earlier release takes none
    if "text" in asked:
        text["text"] = Conditioning(text=asked["text"], pooled=asked["pooled"])
    model = load_model(Path(folder))
    sampling = model.spec.sampling
    exact = {"precision": "fp32", "compile": False}  # as `Sampling.exact`; the code of an earlier release has less
    sampling = sampling.with_fields(**{name: exact[name] for name in exact.keys() & sampling.to_json().keys()})
    images = model.generate(
        asked.get("labels"),
        seed=seed,
        sampling=sampling,
        image_ids=torch.arange(count),
        batch_size=count,
        **text,
    )
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "ddpm"]
    foreign = [str(m.__file__) for m in ours if not Path(str(m.__file__)).resolve().is_relative_to(code)]
    if foreign:
        raise RuntimeError(f"the code of {', '.join(foreign)} was used, which is not the version's")
    if not bool(images.isfinite().all()):
        raise RuntimeError("its pictures are not numbers")
    save_file({"images": to_uint8(images).contiguous()}, out)


if __name__ == "__main__":
    gc.disable()  # what torch brings stays until the end: looking for garbage in it is a third of this process's time
    main(**json.loads(sys.argv[1]))
    gc.freeze()  # nor is it looked through when Python ends
