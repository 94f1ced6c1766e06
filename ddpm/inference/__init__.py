"""Drawing pictures with a model: from noise, around known pixels, and from other pictures.

    noise = Noise.of([7, 8])                                     # a seed for each picture
    draw(model, noise, Conditioning(label=labels))               # samples
    draw(model, noise, cond, Inpainting(known, mask))            # fills the pixels that the mask hides
    draw(model, noise, cond, Editing(images, strength=0.5))      # keeps the coarse content
    draw(model, noise, cond, Inverting(images, source=labels))   # DDIM inversion, then drawing with another condition

A `Drawing` holds these arguments; drawings that share their settings can be drawn in one network batch:

    pictures = cut(join(drawings).draw(model), [len(each) for each in drawings])

A picture depends only on its own row of noise, condition and image, up to float rounding, and not on its batch.
"""

from ddpm.inference.checks import (
    MAX_VALUES,
    can_inpaint,
    check_condition,
    check_count,
    check_images,
    check_mask,
    check_names,
    check_steps,
    check_takes_text,
    class_indices,
)
from ddpm.inference.drawing import Drawing, Drawn, Film, cut, draw, join
from ddpm.inference.noise import Noise
from ddpm.inference.table import (
    COLUMNS,
    check_method,
    check_sampling,
    draw_table,
    inpainting_method,
    parameters,
    row_drawings,
    table_drawings,
)
from ddpm.inference.tasks import (
    INPAINTERS,
    METHODS,
    TRAINED,
    Editing,
    FromNoise,
    Inpainting,
    Inverting,
    Task,
    method_name,
)

__all__ = [
    "COLUMNS",
    "INPAINTERS",
    "MAX_VALUES",
    "METHODS",
    "TRAINED",
    "Drawing",
    "Drawn",
    "Editing",
    "Film",
    "FromNoise",
    "Inpainting",
    "Inverting",
    "Noise",
    "Task",
    "can_inpaint",
    "check_condition",
    "check_count",
    "check_images",
    "check_mask",
    "check_method",
    "check_names",
    "check_sampling",
    "check_steps",
    "check_takes_text",
    "class_indices",
    "cut",
    "draw",
    "draw_table",
    "inpainting_method",
    "join",
    "method_name",
    "parameters",
    "row_drawings",
    "table_drawings",
]
