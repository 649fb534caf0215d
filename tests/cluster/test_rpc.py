"""Serving an engine to another process: what it raises travels as text, with its traceback."""

from __future__ import annotations

import pickle

from comparator.cluster.rpc import Call, Host, Raised
from comparator.util import error_log


class Failing:
    """An engine whose loading fails deep inside a library."""

    def load(self, cancel, on_progress):
        on_progress(0.5, "reading")
        raise KeyError("model.layers.3")


def test_an_exception_of_an_actor_arrives_with_its_traceback(own_dirs):
    batches = list(Host(Failing()).serve(Call("load", cancellable=True, callback="on_progress")))
    items = [item for batch in pickle.loads(pickle.dumps(batches)) for item in batch]
    assert items[0] == (0.5, "reading") and isinstance(items[-1], Raised)
    error = items[-1].error
    assert "KeyError" in error.problem and "in load" in error.report.traceback
    assert error.report.id in error_log.log_file().read_text(), "the node's own log does not name it"
