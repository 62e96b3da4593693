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
    together = set()
    for samples, n, k, tile, block in product([1, 4, 8], [12, 14, 64], [20, 48, 62, 64, 96], [2, 4, 8], [32, 64, 128]):
        x = torch.arange(samples * n * k).view(samples, n, k)
        tiling = Tiling.of(x, tile)
        joined = tiling.in_whole_blocks(block, x)
        if joined.together == 1:
            assert joined == tiling
            continue
        assert joined.groups % block_size(tiling, block) == 0
        assert joined.rows * joined.groups == tiling.rows * tiling.groups
        (_, _, rows_of_one, rows, columns), (sample, row, feature) = joined.sizes(), joined.strides(x)
        assert (rows, columns) == (tiling.rows, tiling.columns)
        of_tiles = torch.nn.functional.pad(x, (0, 0, 0, -n % tile)).view(tiling.rows, tile, k)[:, 0]  # the first of t
        for p in (0, joined.rows - 1):
            for side in range(joined.together):
                sample_of = p // rows_of_one * joined.together + side
                place = sample_of * sample + p % rows_of_one * tile * row + torch.arange(k) * feature
                assert torch.equal(x.flatten()[place], of_tiles[sample_of * rows_of_one + p % rows_of_one])
        together.add((joined.together, joined.n == n))
    assert {(2, True), (2, False), (8, True), (8, False)} < together


def test_samples_of_rows_that_are_full_and_equally_far_apart_are_the_rows():
    x = torch.empty(8, 64, 96)
    tiling = Tiling.of(x, 4)
    assert tiling.in_whole_blocks(64, x, None) == Tiling(128, 4, 96, 4, 24, 8)
    assert Tiling.of(x[:1], 4).in_whole_blocks(64, x[:1].mT.contiguous().mT) == Tiling(16, 4, 96, 4, 24, 8)
    for other in (x[:, :62], torch.empty(8, 65, 96)[:, :64]):
        assert Tiling.of(other, 4).in_whole_blocks(64, other) == Tiling(*other.shape, 4, 24, 8)


def test_rows_stay_apart_where_tiles_are_not_full_or_samples_are_too_few():
    x = torch.empty(8, 64, 96)
    for other, tile in ((x[:, :, :94], 4), (x[:7, :62], 4), (x[:1, :12], 4), (x[..., :20], 2)):
        assert Tiling.of(other, tile).in_whole_blocks(64, other) == Tiling.of(other, tile)
