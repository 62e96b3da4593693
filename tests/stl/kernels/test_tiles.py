"""What kernels are compiled not to ask: a wrong answer reads and writes memory that is not theirs."""

from itertools import product

import torch

from stl.kernels.tiles import Grid, Tiling, block_size, constants


def exist(tiling: Tiling, grid: Grid) -> tuple[bool, bool, bool]:
    """Whether all rows, all entries of the groups there are, and all tiles exist that the programs of a grid reach."""
    tile, (samples, n, k, _, columns, _) = tiling.tile, tiling
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


def test_rows_side_by_side_are_the_same_numbers_in_whole_blocks():
    changed = 0
    for samples, n, k, tile, block in product([1, 3, 8], [12, 16, 64], [20, 48, 62, 64, 96], [2, 4, 8], [32, 64, 128]):
        tiling, x = Tiling(samples, n, k, tile, -(-k // tile)), torch.arange(samples * n * k).view(samples, n, k)
        joined = tiling.in_whole_blocks(block, x)
        if joined.together == 1:
            assert joined == tiling
            continue
        changed += 1
        assert joined.groups % block_size(tiling, block) == 0
        assert joined.rows * joined.columns == tiling.rows * tiling.columns
        of_tiles = x.view(-1, tile, tiling.columns, tile)  # rows, rows of one, columns, features of one
        own = torch.arange(joined.columns)
        row, column = own // tiling.columns, own % tiling.columns
        for p in (0, joined.rows - 1):
            place = p * joined.strides(x)[0] + row * tile * x.stride(1) + column * tile
            assert torch.equal(x.flatten()[place], of_tiles[p * joined.together + row, 0, column, 0])
    assert changed > 20


def test_rows_stay_apart_where_tiles_are_not_full_or_samples_are_not_in_one_piece():
    x = torch.empty(8, 64, 96)
    tiling = Tiling.of(x, 4)
    assert tiling.in_whole_blocks(64, x, None).together == 8
    for other in (x[:, :, :94], x[:, :62]):
        assert Tiling.of(other, 4).in_whole_blocks(64, other.contiguous()).together == 1
    assert tiling.in_whole_blocks(64, torch.empty(8, 65, 96)[:, :64]).together == 1
    assert Tiling.of(x[:1, :12], 4).in_whole_blocks(64).together == 1  # three rows of tiles
