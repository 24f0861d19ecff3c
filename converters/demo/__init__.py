"""A small model of our own that sees: synthetic pictures with questions, its tokenizer, its training.

    python -m converters.demo.train FOLDER           train on the CPU, write FOLDER/checkpoint (transformers' format)
    python -m converters FOLDER/checkpoint -o OUT    convert it as any other checkpoint
    python -m bench quality OUT                      its scores

`pictures` needs Pillow, NumPy and matplotlib's fonts; `model` and `train` need torch and transformers as well. docs/demo-model.md
has the recipe and the scores.
"""
