"""Read by the build, too, without importing anything."""

VERSION = '0.1.0'
