package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// NewConfig applies changes in the words of a Dockerfile, "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL",
// "USER", "VOLUME" and "WORKDIR", to a configuration. Values are read as Docker does, but variables in them are not replaced.
func NewConfig(changes []string) (Config, error) {
	var c Config
	for _, line := range changes {
		if err := applyChange(&c, line); err != nil {
			return Config{}, fmt.Errorf("change %q: %w", line, err)
		}
	}
	return c, nil
}

var errChange = errors.New("not understood; give a word such as CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR and its value")

// applyChange applies one line.
func applyChange(c *Config, line string) (err error) {
	word, value := cutBlank(strings.TrimSpace(line))
	if value == "" {
		return errChange
	}
	switch strings.ToUpper(word) {
	case "CMD":
		c.Cmd, err = command(value)
	case "ENTRYPOINT":
		c.Entrypoint, err = command(value)
	case "ENV":
		err = pairs(value, func(name, val string) {
			c.Env = slices.DeleteFunc(c.Env, func(have string) bool { return strings.HasPrefix(have, name+"=") })
			c.Env = append(c.Env, name+"="+val)
		})
	case "LABEL":
		err = pairs(value, func(name, val string) {
			if c.Labels == nil {
				c.Labels = map[string]string{}
			}
			c.Labels[name] = val
		})
	case "EXPOSE":
		ports := strings.Fields(value)
		for i, p := range ports {
			if !strings.Contains(p, "/") {
				ports[i] = p + "/tcp" // as Docker has them
			}
		}
		c.ExposedPorts = addKeys(c.ExposedPorts, ports)
	case "HEALTHCHECK":
		c.Healthcheck, err = healthcheck(value)
	case "VOLUME":
		list, ok, err := jsonList(value)
		if err != nil {
			return err
		}
		if !ok {
			list = strings.Fields(value)
		}
		c.Volumes = addKeys(c.Volumes, list)
	case "STOPSIGNAL":
		c.StopSignal = value
	case "USER":
		c.User = value
	case "WORKDIR":
		c.WorkingDir = value
	default:
		return errChange
	}
	return err
}

// MinHealthTime is the least that an interval, timeout or start period of a health check can be, other than 0.
const MinHealthTime = time.Millisecond

// healthcheck reads options and "CMD" with a command, or "NONE".
func healthcheck(v string) (*Healthcheck, error) {
	var h Healthcheck
	word, rest := cutBlank(v)
	for ; strings.HasPrefix(word, "--"); word, rest = cutBlank(rest) {
		if err := healthOption(&h, word); err != nil {
			return nil, err
		}
	}
	switch strings.ToUpper(word) {
	case "NONE":
		if rest != "" {
			return nil, errors.New("NONE takes nothing more")
		}
		return &Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"NONE"}}}, nil
	case "CMD":
	default:
		return nil, fmt.Errorf("%s is not understood; use HEALTHCHECK [OPTIONS] CMD and a command, or HEALTHCHECK NONE", quoteName(word))
	}
	list, ok, err := jsonList(rest)
	switch {
	case err != nil:
		return nil, err
	case ok && len(list) > 0:
		h.Test = append([]string{"CMD"}, list...)
	case !ok && rest != "":
		h.Test = []string{"CMD-SHELL", rest}
	default:
		return nil, errors.New("a command is missing after CMD")
	}
	return &h, nil
}

// healthOption reads one --name=value.
func healthOption(h *Healthcheck, option string) error {
	name, val, _ := strings.Cut(strings.TrimPrefix(option, "--"), "=")
	var d *time.Duration
	switch name {
	case "interval":
		d = &h.Interval
	case "timeout":
		d = &h.Timeout
	case "start-period":
		d = &h.StartPeriod
	case "start-interval":
		d = &h.StartInterval
	case "retries":
		n, err := strconv.ParseInt(val, 10, 32)
		if err != nil || n < 0 {
			return fmt.Errorf("--retries=%s: use a number that is not negative", quoteName(val))
		}
		h.Retries = int(n)
		return nil
	default:
		return fmt.Errorf("unknown option %s; use --interval=, --timeout=, --start-period=, --start-interval= or --retries=", quoteName(option))
	}
	var err error
	if *d, err = time.ParseDuration(val); err != nil || *d != 0 && *d < MinHealthTime {
		return fmt.Errorf("--%s=%s: use a duration such as 30s, of at least %v", name, quoteName(val), MinHealthTime)
	}
	return nil
}

// cutBlank cuts s around its first blanks.
func cutBlank(s string) (before, after string) {
	i := strings.IndexFunc(s, unicode.IsSpace)
	if i < 0 {
		return s, ""
	}
	return s[:i], strings.TrimSpace(s[i:])
}

// command reads a JSON list of strings; anything else is for the shell, also where it begins like a list.
func command(v string) ([]string, error) {
	list, ok, err := jsonList(v)
	if err != nil || ok {
		return list, err
	}
	return []string{"/bin/sh", "-c", v}, nil
}

func jsonList(v string) (list []string, ok bool, err error) {
	if !strings.HasPrefix(v, "[") || !json.Valid([]byte(v)) {
		return nil, false, nil
	}
	if json.Unmarshal([]byte(v), &list) != nil {
		return nil, false, errors.New("a list can only hold strings")
	}
	return list, true, nil
}

// pairs reads one or more name=value, with quotes as in a shell, or the older form of a name, a blank, and all the rest.
func pairs(v string, set func(name, val string)) error {
	words, err := splitWords(v)
	if err != nil {
		return err
	}
	if !strings.Contains(words[0], "=") {
		name, rest := cutBlank(v)
		if rest == "" {
			return fmt.Errorf("%s has no value; use name=value", quoteName(name))
		}
		return setPair(name, rest, set)
	}
	for _, w := range words {
		name, val, ok := strings.Cut(w, "=")
		if !ok {
			return fmt.Errorf("%s has no value; use name=value, and quotes around a value with blanks", quoteName(w))
		}
		if err := setPair(name, val, set); err != nil {
			return err
		}
	}
	return nil
}

func setPair(name, val string, set func(name, val string)) error {
	name, nerr := unquote(name)
	val, verr := unquote(val)
	if err := errors.Join(nerr, verr); err != nil {
		return err
	}
	if name == "" {
		return errors.New("a name is empty")
	}
	set(name, val)
	return nil
}

// splitWords cuts v at blanks that are neither quoted nor escaped. Quotes and backslashes stay.
func splitWords(v string) ([]string, error) {
	var words []string
	start := -1
	for i := 0; i < len(v); {
		if strings.IndexByte(" \t\r\n", v[i]) >= 0 {
			if start >= 0 {
				words = append(words, v[start:i])
			}
			start = -1
			i++
			continue
		}
		if start < 0 {
			start = i
		}
		n, err := tokenLen(v[i:])
		if err != nil {
			return nil, err
		}
		i += n
	}
	if start >= 0 {
		words = append(words, v[start:])
	}
	return words, nil
}

// tokenLen is the length of what s begins with: a quoted part, an escaped byte, or one byte.
func tokenLen(s string) (int, error) {
	switch s[0] {
	case '\\':
		return min(2, len(s)), nil
	case '\'', '"':
		for i := 1; i < len(s); i++ {
			switch {
			case s[i] == s[0]:
				return i + 1, nil
			case s[i] == '\\' && s[0] == '"':
				i++
			}
		}
		return 0, fmt.Errorf("a quote has no end: %s", quoteName(s))
	}
	return 1, nil
}

// unquote takes quotes and backslashes off, as a shell does.
func unquote(s string) (string, error) {
	var out strings.Builder
	for len(s) > 0 {
		n, err := tokenLen(s)
		if err != nil {
			return "", err
		}
		token := s[:n]
		s = s[n:]
		switch token[0] {
		case '\'':
			out.WriteString(token[1 : n-1])
		case '"':
			for t := token[1 : n-1]; t != ""; {
				if len(t) > 1 && t[0] == '\\' && strings.IndexByte(`"$\`, t[1]) >= 0 {
					t = t[1:]
				}
				out.WriteByte(t[0])
				t = t[1:]
			}
		default:
			out.WriteString(token[n-1:]) // an escaped byte, or a plain one
		}
	}
	return out.String(), nil
}

func addKeys(m map[string]struct{}, list []string) map[string]struct{} {
	if m == nil {
		m = map[string]struct{}{}
	}
	for _, k := range list {
		m[k] = struct{}{}
	}
	return m
}
