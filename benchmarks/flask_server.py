"""The server of a beginner's tutorial, for benchmarks/serve.py to stand beside: Flask and `transformers` generate.

    python benchmarks/flask_server.py FOLDER PORT

One request at a time: `app.run` with threads would have several calls of `generate` fight for the same cores.
"""

import sys

import torch
from flask import Flask, jsonify, request
from transformers import AutoTokenizer, GPT2LMHeadModel

folder, port = sys.argv[1:]
app = Flask(__name__)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


@app.route("/generate", methods=["POST"])
def generate():
    body = request.get_json()
    inputs = tokenizer(body["prompt"], return_tensors="pt")
    with torch.no_grad():
        made = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=body["max_new_tokens"],
            do_sample=True,
            temperature=0.8,
            top_k=50,
            top_p=0.95,
            pad_token_id=model.config.eos_token_id,
        )
    new_tokens = made.shape[1] - inputs["input_ids"].shape[1]
    return jsonify({"generated_text": tokenizer.decode(made[0], skip_special_tokens=True), "new_tokens": new_tokens})


@app.route("/ready")
def ready():
    return jsonify({"status": "ready"})


app.run(host="127.0.0.1", port=int(port), threaded=False)
