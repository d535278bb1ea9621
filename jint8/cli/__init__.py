"""The jint8 command."""
