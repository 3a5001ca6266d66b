package image

import (
	"errors"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// applyChange applies one line.
func applyChange(c *v1.Config, line string) (err error) {
	word, value, _ := strings.Cut(strings.TrimSpace(line), " ")
	value = strings.TrimSpace(value)
	if value == "" {
		return errChange
	}
	switch strings.ToUpper(word) {
	case "CMD":
		c.Cmd, err = words(value)
	case "ENTRYPOINT":
		c.Entrypoint, err = words(value)
	case "ENV":
		key, val, ok := pair(value)
		if !ok {
			return errors.New("ENV takes name=value")
		}
		c.Env = append(c.Env, key+"="+val)
	case "LABEL":
		key, val, ok := pair(value)
		if !ok {
			return errors.New("LABEL takes name=value")
		}
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		c.Labels[key] = val
	case "EXPOSE":
		c.ExposedPorts = addKeys(c.ExposedPorts, value)
	case "VOLUME":
		if strings.HasPrefix(value, "[") {
			list, err := words(value)
			if err != nil {
				return err
			}
			value = strings.Join(list, " ")
		}
		c.Volumes = addKeys(c.Volumes, value)
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

// pair reads name=value, or the older form with a blank; quotes around the value are taken off.
func pair(s string) (key, val string, ok bool) {
	i := strings.IndexAny(s, "= ")
	if i <= 0 {
		return "", "", false
	}
	key, val = s[:i], strings.TrimSpace(s[i+1:])
	if len(val) >= 2 && (val[0] == '"' || val[0] == '\'') && val[len(val)-1] == val[0] {
		val = val[1 : len(val)-1]
	}
	return key, val, true
}

func addKeys(m map[string]struct{}, list string) map[string]struct{} {
	if m == nil {
		m = map[string]struct{}{}
	}
	for _, k := range strings.Fields(list) {
		m[k] = struct{}{}
	}
	return m
}
