"""One runtime and one model in a process of its own, which answers the requests of `benchmarks.serving_cpu`.

A process of its own, because memory can't be told apart within one, and because runtimes take each other's threads.
Requests and answers are lines of JSON; a request is a batch size, and its answer the seconds of one call.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


TOKENS = 128
Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], object]


def _pytorch(folder: Path) -> Run:
    import torch
    from transformers import AutoModel

    torch.set_num_threads(1)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return _run_pytorch(model)


def _pytorch_compiled(folder: Path) -> Run:
    import torch
    from transformers import AutoModel

    torch.set_num_threads(1)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return _run_pytorch(torch.compile(model, dynamic=False))


def _run_pytorch(model) -> Run:
    import torch

    @torch.inference_mode()
    def run(inputs: Inputs) -> object:
        return model(**{name: torch.from_numpy(array) for name, array in inputs.items()})

    return run


def _onnx_runtime(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _openvino(file: Path, sparse_rate: float = 1.0) -> Run:
    import openvino

    # Without a hint it computes in bfloat16 where the CPU can, which the others here don't.
    options = {
        "INFERENCE_NUM_THREADS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": sparse_rate,
    }
    compiled = openvino.Core().compile_model(str(file), "CPU", options)
    request = compiled.create_infer_request()

    def run(inputs: Inputs) -> object:
        return request.infer(inputs)

    def kernels() -> dict[str, int]:
        facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        layers = [fact for fact in facts if fact["layerType"].astype(str) == "FullyConnected"]
        return dict(Counter(fact["primitiveType"].astype(str) for fact in layers))

    run.kernels = kernels
    return run


class Runtime(NamedTuple):
    """
    A way to serve a model.

    Args:
        file (`str`):
            What it reads in the folder of a model.
        load (`Callable`):
            Makes a function of that file that runs a batch.
        weights (`tuple[str, ...]`):
            Which models it is timed with: what compiles for minutes, or asks for zeros, is timed with one.
    """

    file: str
    load: Callable[[Path], Run]
    weights: tuple[str, ...] = ("dense", "2:4")


# PyTorch first, since the others are divided by it.
RUNTIMES = {
    "PyTorch": Runtime(".", _pytorch),
    "PyTorch, torch.compile": Runtime(".", _pytorch_compiled, ("dense",)),
    "ONNX Runtime": Runtime("model.onnx", _onnx_runtime),
    "ONNX Runtime, int8": Runtime("int8.onnx", _onnx_runtime),
    "OpenVINO": Runtime("model.onnx", _openvino),
    "OpenVINO, int8": Runtime("int8.xml", _openvino),
    "OpenVINO, int8, sparse weights": Runtime("int8.xml", lambda file: _openvino(file, 0.5), ("2:4",)),
}


def inputs(batch: int) -> Inputs:
    """Random tokens of BERT's vocabulary."""
    ids = np.random.default_rng(batch).integers(1000, 30000, (batch, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def memory() -> dict[str, float]:
    """MiB of this process: now, and at most so far (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": int(fields["VmRSS"]) / 1024, "peak": int(fields["VmHWM"]) / 1024}


class Process:
    """
    A process that has loaded a model into a runtime.

    Args:
        runtime (`str`):
            Name of the runtime.
        folder (`Path`):
            Folder of the model in all of its forms.
    """

    def __init__(self, runtime: str, folder: Path):
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.runtimes", runtime, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **quiet},
        )

    def ask(self, request: object) -> dict:
        """
        Sends a request and waits for its answer.

        Raises:
            `RuntimeError`: If the process has died, with the last line that it wrote.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            lines = self._process.communicate()[1].strip().splitlines() or ["no message"]
            raise RuntimeError(lines[-1])
        return json.loads(answer)

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def main(runtime: str, folder: str) -> None:
    """Answers until there are no more requests: `"facts"`, or a batch size."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    run = RUNTIMES[runtime].load(Path(folder) / RUNTIMES[runtime].file)
    for line in sys.stdin:
        request = json.loads(line)
        if request == "facts":
            gc.collect()
            answer = {"memory": memory(), "kernels": run.kernels() if hasattr(run, "kernels") else {}}
        else:
            batch = inputs(request)
            wall, cpu = time.perf_counter(), time.process_time()
            run(batch)
            answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
