from codmd import kernels
from codmd.ops.backends.adapter import Adapter

load_error = kernels.load_error
adapter = Adapter(kernels, kernels)
