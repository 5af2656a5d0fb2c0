"""Act: what follows from an alert. Hooks and a webhook, the rows behind it, and the weights of before it."""
