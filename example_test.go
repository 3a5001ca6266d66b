package coffer_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/coffer-box/coffer"
)

// Where the examples find the program: they run with the tests, where it is neither installed nor beside them.
func config() coffer.Config {
	return coffer.Config{Home: os.Getenv("COFFER_EXAMPLE_HOME"), Helper: "bin/coffer"}
}

func Example() {
	ctx := context.Background()
	rt, err := coffer.Open(ctx, config())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer rt.Close()
	box, err := rt.Run(ctx, coffer.Spec{Image: "base", Cmd: []string{"sleep", "600"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	out, err := box.Command(ctx, "echo", "hi").Output()
	fmt.Printf("%s%v\n", out, err)
	fmt.Println(box.Stop(ctx))
	fmt.Println(box.Remove(ctx))
	// Output:
	// hi
	// <nil>
	// <nil>
	// <nil>
}

func ExampleCommand() {
	ctx := context.Background()
	rt, err := coffer.Open(ctx, config())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer rt.Close()
	box, err := rt.Run(ctx, coffer.Spec{Image: "base", Cmd: []string{"sleep", "600"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer box.Remove(ctx, coffer.Force())

	cmd := box.Command(ctx, "sh", "-c", "echo out; echo err >&2; exit 3")
	cmd.Stdout = os.Stdout
	cmd.Timeout = 10 * time.Second
	err = cmd.Run()
	var ee *coffer.ExitError
	if errors.As(err, &ee) {
		fmt.Println("code", ee.Code)
	}
	// Output:
	// out
	// code 3
}
