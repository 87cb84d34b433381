from codmd.ops import _cpp, _cpp_dmd
from codmd.ops.backends.adapter import Adapter

load_error = _cpp.load_error
adapter = Adapter(_cpp, _cpp_dmd) if load_error is None else None
