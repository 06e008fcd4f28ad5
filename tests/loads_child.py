"""Asked by test_loads in an environment of its own, which knows nothing of this project.

ids FOLDER LINES OUT: ids of transformers (and of `tokenizers` alone) for each line.
llama GGUF LINES OUT: ids of llama.cpp for each line, and its greedy continuation of the first.
"""

import http.client
import json
import os
import sys


def ids(folder, lines):
    import tokenizers
    import transformers

    opened = transformers.AutoTokenizer.from_pretrained(folder)
    plain = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    return dict(
        version=transformers.__version__,
        ids=opened(lines)["input_ids"],
        plain=[found.ids for found in plain.encode_batch(lines)],
    )


def llama(path, lines):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 512
    params.port = 0
    params.warmup = False
    server = xllamacpp.Server(params)
    host, port = server.listening_address.removeprefix("http://").split(":")
    link = http.client.HTTPConnection(host, int(port))

    def ask(what, **body):
        link.request("POST", what, json.dumps(body), {"Content-Type": "application/json"})
        return json.loads(link.getresponse().read())

    found = [ask("/tokenize", content=line, add_special=True)["tokens"] for line in lines]
    greedy = dict(n_predict=16, temperature=0, return_tokens=True, cache_prompt=False)
    return dict(ids=found, greedy=ask("/completion", prompt=lines[0], **greedy)["tokens"])


if __name__ == "__main__":
    what, source, lines_path, out = sys.argv[1:]
    with open(lines_path, encoding="utf-8") as file:
        given = json.load(file)
    answer = dict(ids=ids, llama=llama)[what](source, given)
    with open(out, "w", encoding="utf-8") as file:
        json.dump(answer, file)
    sys.stdout.flush()
    os._exit(0)  # a server that is still listening would not let the interpreter end
