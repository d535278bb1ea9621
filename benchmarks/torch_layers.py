"""Stage 6, a process of its own: bitsandbytes' LLM.int8() layer and PyTorch's bf16 layer, where they are installed."""

import json
import sys
import time


def main() -> None:
    try:
        import bitsandbytes as bnb
        import torch
    except ImportError as error:
        print(json.dumps({"skipped": str(error)}))
        return
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "PyTorch sees no GPU"}))
        return

    def seconds(layer, x, calls=20, rounds=7):
        with torch.no_grad():
            layer(x)
            times = []
            for _ in range(rounds):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    layer(x)
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) / calls)
        return sorted(times)[rounds // 2]

    table = []
    for k, n in ((4096, 16384), (2048, 8192), (4096, 4096)):
        dense = torch.nn.Linear(k, n, bias=False, dtype=torch.float16, device="cuda")
        for m in (2048, 64, 16, 1):
            x = torch.randn(m, k, dtype=torch.float16, device="cuda").clamp(-5.5, 5.5)
            x[:, :: k // 6] *= 30
            row = {"m": m, "k": k, "n": n, "torch_16bit": seconds(dense, x)}
            for threshold in (6.0, 0.0):
                layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
                layer.load_state_dict(dense.state_dict())
                row[f"bitsandbytes_{threshold:g}"] = seconds(layer.cuda(), x)
            table.append(row)
    versions = {"torch": torch.__version__, "bitsandbytes": bnb.__version__}
    print(json.dumps({"versions": versions, "table": table}))


if __name__ == "__main__":
    sys.exit(main())
