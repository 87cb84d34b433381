from codmd.ops import _cuda, _cuda_dmd
from codmd.ops.backends.adapter import Adapter

load_error = _cuda.load_error
adapter = Adapter(_cuda, _cuda_dmd)
