"""The measured cases: shapes (out, in), tokens, sparsities; the full grid and a quick one."""

from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """Every combination is measured. `large` weights exceed the last-level cache, and meet one token.

    Layers of 1x4 blocks have sparsities of their own.
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    block_sparsities: tuple[float, ...] = (0.5, 0.75, 0.9)
    large: tuple[Shape, ...] = ()
    rounds: int = 11


#: benchmark -> (all of it, a quick look)
GRIDS = {
    "kernels": (
        Grid(((768, 768), (3072, 768)), (128, 512), large=((4096, 4096),)),
        Grid(((768, 768),), (128,), (0.5, 0.9), rounds=3),
    ),
    "layers": (
        Grid(
            ((768, 768), (3072, 768), (768, 3072), (4096, 4096)),
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            large=((4096, 4096), (16384, 8192)),
        ),
        Grid(((768, 768),), (1, 16, 128), (0.5, 0.9), (0.5,), rounds=3),
    ),
    "gpu": (
        Grid(
            ((4096, 4096), (11008, 4096), (4096, 11008)), (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048), (0.5, 0.7, 0.8, 0.9)
        ),
        Grid(((4096, 4096),), (1, 16, 256), (0.5, 0.9), rounds=3),
    ),
    "teams": (
        Grid(((768, 768), (3072, 768), (768, 3072), (4096, 4096)), (1, 16, 128, 512), (0.5, 0.9)),
        Grid(((768, 768),), (16,), (0.9,), rounds=2),
    ),
    "load": (
        Grid(((768, 768), (3072, 768)), (1, 16, 128), (0.5, 0.9)),
        Grid(((768, 768),), (16,), (0.9,)),
    ),
}
