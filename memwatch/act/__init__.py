"""Act: what follows from a verdict. The stop, hooks and a webhook, the rows behind it, and the weights of before it."""
