"""What every command needs: ranks and devices, signals, atomic files, the terminal."""
