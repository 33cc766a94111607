"""Training methods: MoCo and supervised metric learning, each with an adapted queue."""
