"Put the outputs of an executed run into fine_tune_llama3.ipynb, so that its page shows one: all cells but the one that Papermill injected; of a progress bar its last state."
import sys

import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

executed, source = nbformat.read(sys.argv[1], 4), nbformat.read("fine_tune_llama3.ipynb", 4)
executed, _ = CoalesceStreamsPreprocessor(enabled=True).preprocess(executed, {})
ran = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
assert [c.source for c in ran] == [c.source for c in source.cells], "this run was made with another version of the notebook: run it again"
for mine, theirs in zip(source.cells, ran):
    if mine.cell_type == "code": mine.update(outputs=theirs.outputs, execution_count=theirs.execution_count)
nbformat.write(source, "fine_tune_llama3.ipynb")
