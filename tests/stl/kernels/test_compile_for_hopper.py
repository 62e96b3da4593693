from running import program

SHARED_MEMORY = 227 * 1024  # bytes that a block may take on an H100 or H200
FEW = 128  # bytes, where the registers of a thread are 1020

KERNELS = {"_encode", "_decode", "_hidden", "_hidden_backward", "_norm_encode", "_norm_encode_backward", "_add_up"}
BASES = [
    "4,16,hadamard,bfloat16",
    "4,49,strassen,bfloat16",
    "4,24,frame,float32",
    "4,24,frame,bfloat16,96",  # rows of tiles side by side
    "8,48,random,bfloat16",
    "8,64,hadamard,bfloat16",
    "2,7,strassen,bfloat16",
]


def test_every_kernel_compiles_for_an_h200_hardly_spills_and_hands_on_what_was_set_and_nan():
    env = {"TRITON_INTERPRET": "0", "PYTHONPATH": "."}
    done = program("tests/stl/kernels/compile_for_hopper.py", *BASES, env=env, fresh=True)
    assert done.returncode == 0, done.stderr
    _, *of_bases = done.stdout.split("basis ")
    assert len(of_bases) == len(BASES)
    for text in of_bases:
        basis, *lines = text.splitlines()
        kernels = [line.split() for line in lines]
        names = {name for name, *_ in kernels}
        assert names == KERNELS
        for name, shared, spilled, unset, losing in kernels:
            assert int(shared) <= SHARED_MEMORY, (basis, name)
            assert int(spilled) <= FEW, (basis, name)
            assert int(unset) == 0, (basis, name)
            assert int(losing) == 0, (basis, name)
