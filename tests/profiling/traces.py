"""Traces as torch.profiler exports them, made by hand: a host with two threads, and a GPU with streams."""

from dash_kernels.ranges import PREFIX

MAIN, BACKWARD = 100, 200


class TraceOfGpu:
    """Events of a trace in the format that Kineto writes for CUDA. Times are microseconds."""

    def __init__(self):
        self.events = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 0.0, "args": {"name": "python"}}]
        self._correlation = 0
        self._flow = 0

    def call(self, name, start, end, *, thread=MAIN, kind="cpu_op", **arguments):
        self.events.append(
            {
                "ph": "X",
                "cat": kind,
                "name": name,
                "pid": 1,
                "tid": thread,
                "ts": float(start),
                "dur": float(end - start),
                "args": arguments,
            }
        )

    def range(self, name, start, end, *, thread=MAIN):
        self.call(PREFIX + name, start, end, thread=thread, kind="user_annotation")
        # The profiler draws it on the GPU as well, where it is no work.
        self.call(PREFIX + name, start, end, thread=7, kind="gpu_user_annotation", stream=7)

    def kernel(self, name, start, end, *, launched=None, thread=MAIN, stream=7, kind="kernel", **arguments):
        """A kernel, launched by the host at `launched`; None: nothing is known of its launch."""
        self._correlation += 1
        if launched is not None:
            launch = {"thread": thread, "kind": "cuda_runtime", "correlation": self._correlation}
            self.call("cudaLaunchKernel", launched, launched + 0.5, **launch)
        self.call(name, start, end, thread=stream, kind=kind, stream=stream, correlation=self._correlation, **arguments)

    def flow(self, forward, backward):
        """Link the operator that began at `forward` with that of the backward pass that began at `backward`."""
        self._flow += 1
        for phase, thread, start in (("s", MAIN, forward), ("f", BACKWARD, backward)):
            self.events.append(
                {"ph": phase, "cat": "fwdbwd", "name": "fwdbwd", "id": self._flow, "pid": 1, "tid": thread, "ts": start}
            )


def two_steps():
    """Two steps of 1000 microseconds; every activity is in the first one, whose kernels run after their launches.

    Busy: 0 to 60 (all-gather of K and V alone until 20), 100 to 400, 410 to 450, 500 to 900; in all 800 microseconds.
    """
    trace = TraceOfGpu()
    trace.range("steps", 0, 2000)
    trace.range("step", 0, 1000)
    trace.range("step", 1000, 2000)
    # forward: a layer
    trace.range("attention", 1, 60)
    trace.range("core attention", 10, 50)
    trace.kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0, 60, launched=11, stream=20)
    trace.range("attend", 20, 40)
    trace.kernel("attend_pairs_kernel", 20, 60, launched=21)
    trace.call("aten::copy_", 52, 54, **{"Input Dims": [[1000], [1000]], "Input type": ["c10::BFloat16", "float"]})
    trace.kernel("void at::native::unrolled_elementwise_kernel<...>", 100, 110, launched=52.5)
    trace.range("mlp", 70, 90)
    trace.call("aten::mm", 71, 75, **{"Input Dims": [[1000, 2000], [2000, 500]], "Input type": ["float", "float"]})
    trace.kernel("nvjet_hsh_256x128", 110, 210, launched=72)
    trace.kernel("Memset (Device)", 210, 211, launched=73, kind="gpu_memset")
    trace.call("aten::silu", 80, 82)
    trace.kernel("void at::native::vectorized_elementwise_kernel<4, silu>", 211, 220, launched=81)
    # backward, on autograd's thread
    trace.call("SiluBackward0", 300, 310, thread=BACKWARD)
    trace.flow(80, 300)
    trace.call("aten::silu_backward", 301, 309, thread=BACKWARD)
    trace.kernel("void at::native::elementwise_kernel<silu_backward>", 220, 400, launched=302, thread=BACKWARD)
    # gradients and optimizer; and a kernel that nobody knows
    trace.range("gradients", 400, 420)
    trace.kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(...)", 410, 450, launched=401, stream=21)
    trace.range("optimizer", 430, 470)
    trace.kernel("void at::native::multi_tensor_apply_kernel<...>", 500, 800, launched=440)
    trace.kernel("mystery", 800, 900)
    # outside of the window
    trace.kernel("mystery", 2100, 2200)
    return trace.events
