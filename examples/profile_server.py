"""A small HTTP server whose requests name the profile that answers them. Standard library only.

python examples/profile_server.py --port 8000
curl localhost:8000 -d '{"prompt": "def read(", "profile": "records", "max_new_tokens": 20}'
"""

import argparse
import json
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compiler import dynamo_compile
from moe_compiler.embedded import MODEL_FOLDER, load_text


def make_server(model: Any, tokenizer: Any, port: int) -> ThreadingHTTPServer:
    """A server of a compiled model: requests of one profile run side by side, those of another wait for their end."""
    turn = threading.Lock()

    def answer(prompt: str, profile: str = "calibration", max_new_tokens: int = 20) -> dict[str, str]:
        with ExitStack() as stack:
            with turn:  # nobody switches between our switch and our hold
                if model.runtime.active != profile:
                    model.runtime.switch(profile, timeout=600)
                stack.enter_context(model.runtime.hold())
            inputs = tokenizer(prompt, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return {"profile": profile, "text": tokenizer.decode(tokens[0], skip_special_tokens=True)}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                status, reply = 200, answer(**json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            except (TypeError, ValueError) as error:
                status, reply = 400, {"error": str(error)}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

    return ThreadingHTTPServer(("localhost", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or name on the hub, compiled or not")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on, of each text, and to adapt to")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    name = MODEL_FOLDER if options.model == "embedded" else options.model
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    if not hasattr(model, "runtime"):  # not compiled yet
        dynamo_compile(model, {"docs": [load_text("docs", "train", 4 * options.tokens)]}, tokenizer=tokenizer)
    model.runtime.adapt([load_text("records", "train", 4 * options.tokens)], name="records")
    with make_server(model, tokenizer, options.port) as server:
        print(f"serving on http://localhost:{server.server_port}, profiles: {', '.join(model.runtime.profiles)}")
        server.serve_forever()
