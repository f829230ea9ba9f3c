"""Chat: conversations become token ids and labels. The tokenizer is passed in: knows no torch."""
