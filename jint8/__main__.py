"""`python -m jint8`."""

from jint8_main import run

if __name__ == "__main__":
    run()
