"""Times PyTorch's scaled_dot_product_attention on the shapes of a bench run, on the CUDA card of this machine.

    python3 measure_torch.py ROWS > OUT

ROWS holds one JSON object per line, as `wgpu-attention bench --json` prints them; OUT gets objects with the same keys.
Of the shapes in ROWS, those measured on an adapter with the card's name are taken, or all if there is none.

What the figures are:

- times_ms, median_ms, p5_ms, p25_ms, p75_ms, p95_ms: CUDA events around each call, calls queued without waiting in
  between, so that the time to launch from Python is hidden as long as the kernel takes longer than that. Caches are warm.
- first_ms: wall clock of the first call of that backend on that shape, the wait for it included.
- gflops: the work that the bench row counts (its gflops times its median_ms) over this median.
- ceiling_gflops: a square matrix product of the same element type. TF32 is off for f32.
- error, budget: the absolute error against float64 that is largest in proportion to its budget, and that budget, the
  first-order error bound of f32 arithmetic. All rows are looked at, or 256 where there are more. A null error is a
  result that is not finite. A kernel that rounds the weights to 16 bits may exceed the budget.
"""

import json
import math
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

BACKENDS = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": getattr(SDPBackend, "CUDNN_ATTENTION", None),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Unit roundoff of the final store, on top of f32 arithmetic.
STORE = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}
SECONDS_PER_CASE = 1.0
# Query rows that the error is taken over, at most.
ROWS_LOOKED_AT = 256


def log(text):
    print(text, file=sys.stderr, flush=True)


def milliseconds(call):
    """Times of many calls by CUDA events, and the wall clock of the first."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = (time.perf_counter() - start) * 1e3
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    count = max(10, min(500, int(SECONDS_PER_CASE / max(once, 1e-6))))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs], first


def ceiling_gflops(dtype):
    n = 4096 if dtype == torch.float32 else 8192
    a = torch.randn(n, n, device="cuda", dtype=dtype)
    b = torch.randn(n, n, device="cuda", dtype=dtype)
    times, _ = milliseconds(lambda: a @ b)
    return 2.0 * n**3 / statistics.median(times) / 1e6


def offset_of(causal, seq_q, seq_kv):
    """Position of query row 0, or None without a causal rule. `causal` is a bool or a name."""
    name = str(causal).lower().replace("_", "").replace("-", "")
    if name in ("false", "none"):
        return None
    if name in ("true", "topleft"):
        return 0
    if name == "bottomright":
        return seq_kv - seq_q
    raise ValueError(f"unknown causal rule {causal!r}")


def causal_arguments(offset, seq_q, seq_kv):
    """How to ask PyTorch for this causal rule in a way that its fused backends take."""
    if offset is None or offset >= seq_kv - 1:
        return {}
    if offset == 0:
        return {"is_causal": True}
    from torch.nn.attention.bias import causal_lower_right

    return {"attn_mask": causal_lower_right(seq_q, seq_kv)}


def error_and_budget(q, k, v, out, offset, dtype):
    """The error that uses most of its budget, with that budget, over the rows looked at."""
    batch, heads, seq_q, head_dim = q.shape
    seq_kv, group = k.shape[2], heads // k.shape[1]
    unit = 2.0**-24
    total = batch * heads * seq_q
    rows = torch.linspace(0, total - 1, min(total, ROWS_LOOKED_AT), dtype=torch.float64).round().long().tolist()
    columns = torch.arange(seq_kv, device="cuda")
    worst = (0.0, 0.0)
    worst_share = -1.0
    for flat in rows:
        b, h, i = flat // (heads * seq_q), flat // seq_q % heads, flat % seq_q
        keys, values = k[b, h // group].double(), v[b, h // group].double()
        query = q[b, h, i].double()
        got = out[b, h, i].double()
        if offset is not None:
            seen = columns <= i + offset
            keys, values = keys[seen], values[seen]
        if keys.shape[0] == 0:
            want, budget = torch.zeros_like(got), torch.zeros_like(got)
        else:
            scale = head_dim**-0.5
            logits = scale * (keys @ query)
            size = scale * (keys.abs() @ query.abs())
            weights = torch.softmax(logits, 0)
            want = weights @ values
            logit_error = unit * (4 * size + 2 * (4 + 2 * (logits.max() - logits)))
            budget = (weights * logit_error) @ (values - want).abs()
            budget += (8 + seq_kv**0.5) * unit * values.abs().max()
            budget += want.abs() * (4 * unit + 1.01 * STORE[dtype])
            budget += 2.0**-24 if dtype == "f16" else 0.0
        error = (got - want).abs()
        share = torch.where(error == 0, 0.0, error / budget.clamp_min(1e-300)).nan_to_num(nan=float("inf"))
        at = int(share.argmax())
        if float(share[at]) > worst_share:
            worst_share = float(share[at])
            worst = (float(error[at]), float(budget[at]))
    return worst


def driver():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        version = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        version = "unknown"
    return f"{version}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def cases(path, card):
    """The different (shape, dtype, causal) of the bench rows, each with its count of floating-point operations."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    rows = [row for row in rows if row["adapter"] == card] or rows
    found = {}
    for row in rows:
        if not row.get("gflops") or not row.get("median_ms"):
            continue
        gflop = row["gflops"] * row["median_ms"] / 1e3
        # The same work in f16 as well: most of PyTorch's fused backends take 16-bit types only.
        for dtype in dict.fromkeys([row["dtype"], "f16"]):
            found.setdefault((row["shape"], dtype, json.dumps(row["causal"])), gflop)
    return found


def main():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    card = torch.cuda.get_device_name(0)
    driver_text = driver()
    ceilings = {}
    failed = False
    for (shape, dtype, causal_text), gflop in cases(sys.argv[1], card).items():
        batch, heads, kv_heads, seq_q, seq_kv, head_dim = (int(n) for n in shape.split(","))
        causal = json.loads(causal_text)
        offset = offset_of(causal, seq_q, seq_kv)
        torch_dtype = DTYPES[dtype]
        if dtype not in ceilings:
            ceilings[dtype] = ceiling_gflops(torch_dtype)
        q = torch.randn(batch, heads, seq_q, head_dim, device="cuda", dtype=torch_dtype)
        k = torch.randn(batch, kv_heads, seq_kv, head_dim, device="cuda", dtype=torch_dtype)
        v = torch.randn(batch, kv_heads, seq_kv, head_dim, device="cuda", dtype=torch_dtype)
        arguments = causal_arguments(offset, seq_q, seq_kv)
        if kv_heads != heads:
            arguments["enable_gqa"] = True
        measured = 0
        for kernel, backend in BACKENDS.items():
            if backend is None:
                continue
            try:
                with sdpa_kernel(backend), torch.inference_mode():
                    times, first = milliseconds(lambda: sdpa(q, k, v, **arguments))
                    error, budget = error_and_budget(q, k, v, sdpa(q, k, v, **arguments), offset, dtype)
            except RuntimeError as reason:  # the backend does not take this problem, or memory ran out
                log(f"{kernel} {shape} {dtype} causal={causal}: {str(reason).splitlines()[0]}")
                torch.cuda.empty_cache()
                continue
            median = statistics.median(times)
            twentieths = statistics.quantiles(times, n=20, method="inclusive")
            measured += 1
            row = {
                "adapter": card,
                "backend": "cuda",
                "driver": driver_text,
                "kernel": kernel,
                "shape": shape,
                "dtype": dtype,
                "causal": causal,
                "times_ms": times,
                "median_ms": median,
                **{f"p{5 * n}_ms": twentieths[n - 1] for n in (1, 5, 15, 19)},
                "first_ms": first,
                "gflops": gflop / median * 1e3,
                "ceiling_gflops": ceilings[dtype],
                "error": error if math.isfinite(error) else None,
                "budget": budget,
            }
            print(json.dumps(row), flush=True)
        if not measured:
            log(f"no backend took {shape} {dtype} causal={causal}")
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
