"""DINOv2 with registers of transformers: DINOv2's table and the register tokens."""

from dataclasses import replace

from ..table import Tower
from .vit import DINOV2

_TABLE = """
    embeddings.register_tokens                         _, _, stream.{first}
"""

DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    name="dinov2_with_registers",
    model_types={"dinov2_with_registers": ""},
    prefixes=("dinov2_with_registers.",),
    towers=(Tower(table=DINOV2.towers[0].table + _TABLE),),
)
