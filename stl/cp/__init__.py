"""CP decomposition of the matrix-multiplication tensor: the solver behind the bases of `basis="als"`.

als.py         batched alternating least squares with a ridge that is a penalty on S
starts.py      where searches start, and the basin hops that they go on with
discretise.py  from an exact decomposition in floating point to one of zeros and signs, exact over the rationals
search.py      the search over many tiles and ranks, round by round, which can be interrupted
table.py       the file of bases that a search writes and the family `als` reads

`import stl` needs table.py alone.
"""
