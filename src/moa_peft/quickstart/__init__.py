"""The embedded default: what a first run needs without a model hub or an account.

`base_model` prepares the packaged Gemma 3 270M, `word_problems` generates the data set.
"""
