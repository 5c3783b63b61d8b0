"""What every agent needs: processes, minibatches and checkpoints."""
