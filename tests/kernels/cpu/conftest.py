import pytest

from sparsify.kernels.cpu import library as native


@pytest.fixture(autouse=True)
def _native_kernels():
    if not native.available():
        pytest.skip(f"no native kernels: {native.why_missing()}")
