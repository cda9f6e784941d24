"""What is trained: frozen dataclasses that turn a batch into a loss.

An objective has `players` (who is trained; a GAN has two), `init(key, batch) -> {player: params}`,
`prepare(frozen, batch) -> batch` (on the device, without gradients) and `loss(player, params, batch, key) ->
(loss, metrics)`; every metric is a float32 pair (sum, count), so that it adds up over micro-batches, steps and hosts.
Randomness is keyed by `batch["index"]`, the global sample index, never by position, batch size or device.
"""
