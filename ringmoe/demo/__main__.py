import sys

from ringmoe.demo.train import main

sys.exit(main())
