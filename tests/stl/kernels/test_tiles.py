"""What kernels are compiled not to ask: a wrong answer reads and writes memory that is not theirs."""

from itertools import product

import torch

from stl.kernels.tiles import Grid, Tiling, constants


def exist(tiling: Tiling, grid: Grid) -> tuple[bool, bool, bool]:
    """Whether all rows, all entries of the groups there are, and all tiles exist that the programs of a grid reach."""
    tile, (samples, n, k, _, columns) = tiling.tile, tiling
    a_sample = -(-n // tile)  # rows of tiles
    rows = [(p // a_sample, p % a_sample * tile + row) for p in range(grid.chunks * grid.rows) for row in range(tile)]
    return (
        all(sample < samples and row < n for sample, row in rows),
        tiling.groups * tiling.group * tile <= k,
        grid.blocks * grid.block * tiling.group <= columns,
    )


def test_what_is_not_asked_holds():
    answers = set()
    sizes = product([1, 3, 5], [11, 12, 16], [20, 60, 62, 64, 128], [2, 4, 8], [0, 1], [1, 2, 4], [16, 32])
    for samples, n, k, tile, more, rows, block in sizes:
        tiling = Tiling(samples, n, k, tile, -(-k // tile) + more)
        grid = Grid(block, rows, 1, -(-tiling.groups // block), -(-tiling.rows // rows))
        answer = constants(tiling, 16, torch.float32, grid)["FULL"]
        assert answer == exist(tiling, grid), (tiling, grid)
        answers.add(answer)
    assert len(answers) == 8
